"""What each verb of the btm-scale command does: one function a verb, no logic.

Nothing heavy is imported before a verb needs it.
"""
