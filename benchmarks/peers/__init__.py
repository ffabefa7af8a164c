"""What the engine is measured against, each as its authors or its users would run it."""
