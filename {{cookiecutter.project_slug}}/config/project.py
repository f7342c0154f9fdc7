"""What the template's prompts answered, as constants: the only rendered Python module."""

# fmt: off
NAME = {{ "%r" | format(cookiecutter.project_name) }}
SLUG = {{ "%r" | format(cookiecutter.project_slug) }}
DESCRIPTION = {{ "%r" | format(cookiecutter.description) }}
BROKER = {{ "%r" | format(cookiecutter.broker) }}
EXAMPLE_APP = {{ cookiecutter.example_app }}
