"""Pages and charts. Nothing here knows what a job is."""
