"""The one-command default: a tiny LaVIN that learns to read pictures on two CPU cores."""
