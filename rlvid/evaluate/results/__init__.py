"""What an evaluation leaves behind: its files, read with care, for other people send them too."""
