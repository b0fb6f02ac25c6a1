"""Draw what was watched: `regard.view.page.page` writes a page, `regard.view.terminal.terminal` a brief for the
terminal.

Nothing is imported here: `page` and `terminal` are both modules and functions, and a re-export would hide the modules.
"""
