"""What each `taskray` command does; `taskray.cli` reads the command line and calls them."""
