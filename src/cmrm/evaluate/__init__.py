"""Rates with honest intervals, and the measurements of the demo."""
