"""Result files as tables, plots and one self-contained HTML page."""
