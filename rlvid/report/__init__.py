"""The report page: a folder of static HTML with the results of evaluations and runs."""
