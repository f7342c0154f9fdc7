"""Nothing is served."""

urlpatterns: list = []
