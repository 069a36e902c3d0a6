"""How an evaluation's numbers are shown: names and formats of metrics, tables, pages."""
