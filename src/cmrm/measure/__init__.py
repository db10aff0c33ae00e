"""The one measuring loop: engine x defence x samples x judges -> outcomes, rates and costs."""
