"""What is sent and answered, as pydantic models with the names of OpenAI's reference; extensions say so."""
