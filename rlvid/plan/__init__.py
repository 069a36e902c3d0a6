"""What a run will cost, before anything starts.

Networks stand on the meta device, where tensors have shapes and no numbers; methods run on networks that only count.
"""
