"""Where metrics are written: metrics.jsonl, TensorBoard, Weights & Biases."""
