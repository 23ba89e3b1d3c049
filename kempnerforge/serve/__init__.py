"""A trained model behind a local web page: ``request`` reads what is asked, ``desk`` answers one at a time, ``web`` speaks HTTP."""
