"""`rlvid doctor`: is machine, cluster or run in order? Each line ok, warning or error, with the way out."""
