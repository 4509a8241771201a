"""How inference engines come to run what was proven: names, emissions, and plugins.

What a plugin imports here needs the standard library only until it has something to do.
"""
