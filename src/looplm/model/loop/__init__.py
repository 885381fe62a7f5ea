"""The loop: inject, core and plan."""
