"""Where metrics are written: files of the run's folder, and trackers."""
