"""A trained model in use: restored, asked, evaluated."""
