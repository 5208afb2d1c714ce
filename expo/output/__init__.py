"""What an output is and says of itself: the checkpoint's writer, manifest and model card, pictures, publishing."""
