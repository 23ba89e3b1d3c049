"""One file per schedule: imported when `scheduler.name` first asks for it. No torch here, configs are read without it."""
