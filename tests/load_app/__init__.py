"""An app for a baked project under test: each request wants a job, each job leaves an effect."""
