"""Training on Ray: the worker loop, the DeepSpeed engine, checkpoints, TensorBoard, and the launch of workers."""
