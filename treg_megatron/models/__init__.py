"""The policy: NeMo model classes, layers, head and architectures."""
