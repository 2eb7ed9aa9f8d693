"""What a precision is worth on the machine that runs it: byte products that are right, agreement with float32.

No torch here: the service checks the same.
"""
