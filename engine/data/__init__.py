"""From files to batches on the device: images, splits, transforms, workers. Nothing here knows of models or runs."""
