"""Images and clips as files: reading them as they are shown, writing, scaling, the watermark."""
