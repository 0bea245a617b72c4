"""An engine over HTTP, spoken to as OpenAI's API is."""
