"""Servers of OpenAI's protocol that steer requests with an image."""
