"""Models -> people: run folders behind HTTP, on Ray Serve, and a page to try them on."""
