"""Requirements and pins as the tests compare them."""

import re


def normalised(name):
    """A requirement's name as package indexes compare names, without extras and versions."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def pins(lines):
    """{name: version} of the lines `name==version`."""
    return {normalised(line): line.partition("==")[2].strip() for line in lines if "==" in line}
