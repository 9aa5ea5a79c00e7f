"""Tools in chat: how they are offered, how an answer calls them, and how that is written to the client."""
