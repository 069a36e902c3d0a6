"""A Ray cluster seen from outside: its address, its token, its nodes."""
