"""The cost of a run, counted before it starts.

Networks stand on the meta device, where tensors have shapes and no numbers; methods run on networks that only count.
"""
