"""HTTP: the OpenAI routes and the memory routes. Imports no torch; the engine is another process."""
