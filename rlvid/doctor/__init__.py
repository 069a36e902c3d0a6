"""`rlvid doctor`: checks of the machine, the cluster or a run; each line is ok, a warning or an error."""
