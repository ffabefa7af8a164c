from llama_reports.command import main

if __name__ == "__main__":
    main()
