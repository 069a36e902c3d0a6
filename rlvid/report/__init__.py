"""The report page: one folder of static HTML that shows what fine-tuning did, from evaluations and runs."""
