"""The HTTP server: the API of OpenAI's clients, on engines that run in this process (extra `serve`)."""
