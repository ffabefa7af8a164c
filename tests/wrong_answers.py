"""Exercises solved in a kernel: not at all, as the lesson does, and wrongly."""

import inspect

import nbformat

from helpers.exercises import TITLE, as_exercise, is_solution


def wrong_answers(value):
    """What somebody might have in place of ``value``: not its type but its content is wrong."""
    import copy
    import dataclasses

    if isinstance(value, bool):
        return [not value]
    if "bool" in str(getattr(value, "dtype", "")):
        return [~value]
    if isinstance(value, dict):
        first = next(iter(value))
        return [{**value, first: wrong} for wrong in wrong_answers(value[first])]
    if isinstance(value, list | tuple):
        return [type(value)([wrong, *value[1:]]) for wrong in wrong_answers(value[0])]
    if isinstance(value, str):
        return [value + "x"]
    if hasattr(value, "num_hidden_layers"):  # a configuration: a layer more
        other = copy.deepcopy(value)
        other.num_hidden_layers += 1
        return [other]
    if dataclasses.is_dataclass(value):
        fields = [name for name in ("scores", "evaluations", "foil") if hasattr(value, name)]
        return [
            dataclasses.replace(value, **{name: wrong})
            for name in fields
            for wrong in wrong_answers(getattr(value, name))
        ]
    if callable(value) or hasattr(value, "columns"):
        return []  # of a model, a function or a table no other is made here
    return [value + 1000, value - 1000, value * float("nan")]


def try_wrong_answers(checker, asked):
    """Run the source ``checker`` with each of the names ``asked`` changed, one after the other."""
    from IPython import get_ipython

    shell = get_ipython()
    for name in asked:
        if name not in shell.user_ns:  # assigned in a branch that this prompt does not take
            continue
        right = shell.user_ns[name]
        for wrong in wrong_answers(right):
            shell.user_ns[name] = wrong
            shell.run_cell(checker)
        shell.user_ns[name] = right


def with_checks(notebook):
    """The notebook with three more cells an exercise, tagged ``undone``, ``done`` and ``wrong``."""
    sources = [inspect.getsource(function) for function in (wrong_answers, try_wrong_answers)]
    cells, asked = [nbformat.v4.new_code_cell("\n\n".join(sources))], ""
    for cell in notebook.cells:
        if is_solution(cell):
            blank, checker = as_exercise(cell.source, TITLE.search(asked)[1])
            names = blank.partition("The check looks at: ")[2].replace("\n# ", " ").split(", ")
            cells += [_tagged("undone", checker), cell, _tagged("done", checker)]
            cells.append(_tagged("wrong", f"try_wrong_answers({checker!r}, {names})"))
        else:
            cells.append(cell)
        asked = cell.source
    notebook.cells = cells
    return notebook


def _tagged(tag, source):
    return nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})


def told(notebook, tag):
    """What the checks in the cells with ``tag`` printed, a text for each exercise."""
    found = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in found]
