"""Views of recorded attention: `regard.view.page.page` returns an HTML page, `regard.view.terminal.terminal` a
summary for the terminal.

This package re-exports nothing: `page` and `terminal` are names of modules as well as functions, and a re-export
would hide the modules.
"""
