"""The one exception that means: what was asked for cannot be done, and here is what to do."""


class InputError(ValueError):
    """Bad input from outside: a prompt, a target, a model, a prompts file, a folder.

    Its message is one or two sentences for the person who typed the input: what was wrong and
    what to do. The command line prints it without a traceback.
    """
