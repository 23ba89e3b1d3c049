"""A model on a local web page: ``request`` reads questions, ``desk`` answers them, ``web`` is HTTP."""
