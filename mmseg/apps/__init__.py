"""What people do with a trained model and their data: videos, reports, checkpoints for others, checks of data."""
