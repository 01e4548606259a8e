"""The problems as data: texts, holes, rungs, usual mistakes, variants."""
