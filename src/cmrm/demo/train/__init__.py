"""The recipe of the demo VLM's weights, its model card, and the choice of its steering setting.

Nothing in here is needed to run the demo VLM.
"""
