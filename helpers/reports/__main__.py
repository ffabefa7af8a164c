from helpers.reports.command import main

main()
