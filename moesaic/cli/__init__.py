"""The command line: flags, exit statuses and printing. One module a verb."""
