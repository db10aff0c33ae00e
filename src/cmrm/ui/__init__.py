"""The playground (`cmrm ui`): the same request as text, with its image, and under two settings."""
