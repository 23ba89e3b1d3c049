"""One file per schedule. They import no torch: configs are read without it."""
