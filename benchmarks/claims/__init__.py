"""Do the claims that this system is built on hold? Each claim, the figures that answer it, and runs that take them."""
